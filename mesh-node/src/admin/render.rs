//! The overview as text, within 100 columns.
