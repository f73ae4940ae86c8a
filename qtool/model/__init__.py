"""The streamed float model: a decoder run one layer at a time, whoever wants to know what flows through it."""
