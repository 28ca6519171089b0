"""Training data: folders of images and masks, what is wrong with them, and rendered street scenes."""
