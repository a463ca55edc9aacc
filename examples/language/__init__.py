"""The parts of the language model example: network and files, tokenizers, generation, training."""
