"""The pipeline: select the stages that have work, run them, record them."""
