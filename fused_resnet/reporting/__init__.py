"""One page of records (`report`), and `charts`."""
