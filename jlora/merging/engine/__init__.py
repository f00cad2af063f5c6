"""What every merge runs on: inputs, streaming, safe spectral functions, laws, the table."""
