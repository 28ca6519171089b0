"""Per task: how a QueryOutput becomes the answer."""
