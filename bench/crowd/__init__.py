"""The whole relay under a crowd: recorded sessions at life's pace, more of them than one key can carry."""
