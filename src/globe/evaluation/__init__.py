"""What a model is worth beside the one it was made from."""
