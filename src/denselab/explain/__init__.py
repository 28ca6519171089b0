"""Which pixels made a model say so: the relevance of `denselab.compress`, as a picture."""
