"""A pass of text through a model, layer by layer: what its linears see, and NF4 weights made for that."""
