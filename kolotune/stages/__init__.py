"""The stages of the pipeline, one module each; `pipeline.stages.STAGES` has their order."""
