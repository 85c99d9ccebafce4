"""The paper's algorithms, transcribed for the tests. Nothing here imports hf_cwd or torch."""
