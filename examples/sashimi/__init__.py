"""The parts of the SaShiMi example: data, baselines, network, training, generation, figures."""
