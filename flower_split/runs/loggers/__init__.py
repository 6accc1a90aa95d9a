"""Where metrics go beside ``metrics.jsonl``: TensorBoard, Weights & Biases, MLflow, plug-ins.

Runs on: The ServerApp.
Read first: ``logger.py``, what a logger is; then ``run_loggers.py``, which feeds them.
"""
