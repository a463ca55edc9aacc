"""The parts of the SaShiMi example: data, count baselines, network, training, generation, figures."""
