"""LightLLM served by Triton server: engine, models and the glue of the model repository."""
