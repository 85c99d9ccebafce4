"""Newton-Schulz orthogonalisation, and which matrices a parameter holds."""
