//! Attention of models that generate scale by scale.
