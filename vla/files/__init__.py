"""Reading, writing and checking files that hold tensors."""
