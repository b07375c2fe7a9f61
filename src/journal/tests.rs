//! Tests of the whole journal against a naive model: a list of complete images.

mod crash;
mod dir;
mod features;
mod ground;
mod nodes;
mod reader;
mod rest;
mod rot;
mod segments;
mod views;
mod world;
