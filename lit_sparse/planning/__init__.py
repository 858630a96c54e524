"""Predict the memory of a training: its module traced on fake tensors, as the device and the ranks would run it."""
