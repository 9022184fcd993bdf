"""An update of state that lies in host memory."""
