"""Trackers: a training's metrics in trackio, Weights & Biases, MLflow or TensorBoard, by their own clients."""
