"""For whoever changes hf_cwd: setting up, ranks on a CPU, runs that are killed, mutants."""
