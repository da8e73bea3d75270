"""What travels between server and clients: schema, encoding, the checks of a reply, sparsity."""
