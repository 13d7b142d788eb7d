"""longspan: how to give a pretrained language model a longer context, found out on any Ray cluster."""
