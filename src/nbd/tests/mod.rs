mod client;
mod hostile;
mod mirror;
mod model;
