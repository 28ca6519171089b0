"""Published methods of quantization after training, each a short file that composes the parts of `compress`."""
