"""The parts of train_lm.py: a small Transformer language model with Mixture-of-Experts layers."""
