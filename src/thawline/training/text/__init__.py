"""Training on rows of text: language models, classifiers and encoders."""
