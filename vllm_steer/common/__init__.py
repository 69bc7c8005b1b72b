"""What every part of the package shares: errors, options, records of origin, files."""
