"""Deployment files made from trained models, each with a report of how far it equals the model in torch."""
