"""Turns batches into optimizer updates and publishes the weights."""
