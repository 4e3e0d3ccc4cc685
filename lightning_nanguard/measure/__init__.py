"""From gradients and losses to one small reading, without waiting for the device."""
