// Whether a structure of Python objects is still the one that was looked at, at a few nanoseconds an object.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace bert_fast {

class Guard {
  public:
    void expect_type(pybind11::object object) {
        pybind11::object type = pybind11::type::of(object);
        types_.push_back({std::move(object), std::move(type)});
    }

    void expect_size(pybind11::dict dict) {
        const auto size = static_cast<Py_ssize_t>(dict.size());
        sizes_.push_back({std::move(dict), size});
    }

    // The entry as it is now.
    void expect_item(pybind11::dict dict, pybind11::object key) {
        pybind11::object value = dict[key];
        items_.push_back({std::move(dict), std::move(key), std::move(value)});
    }

    bool holds() const {
        for (const Type& type : types_)
            if (reinterpret_cast<PyObject*>(Py_TYPE(type.object.ptr())) != type.type.ptr()) return false;
        for (const Size& size : sizes_)
            if (PyDict_Size(size.dict.ptr()) != size.size) return false;
        for (const Item& item : items_)
            if (PyDict_GetItem(item.dict.ptr(), item.key.ptr()) != item.value.ptr()) return false;
        return true;
    }

  private:
    struct Type {
        pybind11::object object, type;
    };
    struct Size {
        pybind11::dict dict;
        Py_ssize_t size;
    };
    struct Item {
        pybind11::dict dict;
        pybind11::object key, value;
    };

    std::vector<Type> types_;
    std::vector<Size> sizes_;
    std::vector<Item> items_;
};

}  // namespace bert_fast
