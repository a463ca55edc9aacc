"""The parts of the language model example: network, folders, vocabularies, generation, training."""
