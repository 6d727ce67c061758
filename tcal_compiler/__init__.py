"""tcal-compile: turns a softmax-attention Transformer into a hybrid Gated DeltaNet student."""
