"""Integer-only inference after I-ViT: softmax, GELU, LayerNorm and requantization in int32 and shifts."""
