"""Results on the Hugging Face Hub."""
