"""Any torch model: measure it, read the measurement with theory, repair its initialization."""
