//! FlowMatchEulerDiscrete.
