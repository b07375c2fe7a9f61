//! The first copy of a guest, from its memory to durable in the standby's journal, link left out:
//! against a copy of the same memory.

use std::hint::black_box;

use super::original::{Original, copy};
use super::pause::no_kvm;
use super::sample::{Samples, time};
use super::{Bench, Section, Unit};

pub(super) fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    if let Some(why) = no_kvm() {
        bench.skip(Section::Seed, why);
        return Ok(());
    }
    let memory_mib = if bench.quick { 64 } else { 1024 };
    if let Some(why) = bench.no_room(memory_mib) {
        bench.skip(Section::Seed, why);
        return Ok(());
    }
    let original = Original::start(memory_mib)?;
    let (mut copies, mut seeds) = (Vec::new(), Vec::new());
    for sample in 0..bench.samples(5) {
        copies.push(time(|| {
            for chunk in original.memory() {
                black_box(chunk.memory.bytes());
            }
        }));
        let dir = bench.dir.path().join(format!("seed-{sample}"));
        seeds.push(original.seed(&mut copy(&dir)?)?);
        std::fs::remove_dir_all(&dir)?;
    }
    let pages = original.layout().ram_pages() as f64;
    let row = |samples: Vec<f64>, what: String| {
        Samples::new(samples).rates(Section::Seed, what, Unit::Pages, pages)
    };
    let limit = row(copies, "copy of the same memory".to_owned());
    let what = format!("{memory_mib} MiB, a quarter in use, durable");
    bench.push(row(seeds, what).against(&limit));
    Ok(())
}
