"""Files of examples: tables, CoNLL columns, SQuAD and BEIR, each read with the numbers of its lines."""
