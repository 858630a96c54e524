"""What methods without a backward pass share: forward passes with perturbed weights, directions, logs of seeds."""
