"""Newton-Schulz orthogonalisation, and the matrices that a parameter holds."""
