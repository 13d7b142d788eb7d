"""longspan: how to give a pretrained language model a longer context, as one command and one library."""
