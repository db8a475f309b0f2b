"""What `tools/train_demo_model.py` is made of: the forward pass, the initialisation, the batches."""
