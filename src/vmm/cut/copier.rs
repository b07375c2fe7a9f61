//! The copier: hands out all pages of a job, in ascending order, as fast as the reader takes them.
//!
//! It alone ends a job. At the end nothing of the job is armed, claimed or protected, whether all
//! was handed out or the job was cancelled.

use super::job::{CancelReason, Cancelled, Filler, Job};
use super::states::PageStates;
use super::strategy::ram_maps;
use super::{CutTarget, PROTECT_GAP_PAGES};
use crate::bitmap::PageBitmap;
use crate::page::{PAGE_SIZE, PageAddr, PageRange, RegionId};
use crate::vmm::staging::Urgency;

/// Hands out everything, or lets go of everything if the job is cancelled.
pub fn run(target: &dyn CutTarget, states: &PageStates, job: &Job) -> Result<(), Cancelled> {
    let mut filler = Filler::default();
    let copied = copy_ram(target, job, &mut filler)
        .and_then(|()| copy_disks(target, states, job, &mut filler))
        .and_then(|()| job.check());
    match copied {
        Ok(()) => {
            filler.announce(job);
            job.announce_pulled();
        }
        Err(Cancelled) => let_go(target, states, job),
    }
    copied
}

fn copy_ram(target: &dyn CutTarget, job: &Job, filler: &mut Filler) -> Result<(), Cancelled> {
    let mut ordinal = 0;
    for (range, map) in ram_maps(target.ram(), &job.pages) {
        let region = range.region;
        for run in map.runs(PROTECT_GAP_PAGES) {
            let mut released = run.start;
            for page in (run.start..run.end).filter(|page| map.get(*page)) {
                if filler.room() == 0 {
                    // Before the wait for the next slot.
                    job.capture.release(
                        region,
                        PageRange {
                            start: released,
                            end: page,
                        },
                    );
                    released = page;
                }
                filler.make_room(job, Urgency::Bulk)?;
                let addr = PageAddr { region, page };
                if job.capture.copy_page(addr, ordinal, filler.next_pages(1)) {
                    filler.push(addr);
                }
                ordinal += 1;
            }
            job.capture.release(
                region,
                PageRange {
                    start: released,
                    end: run.end,
                },
            );
        }
    }
    Ok(())
}

fn copy_disks(
    target: &dyn CutTarget,
    states: &PageStates,
    job: &Job,
    filler: &mut Filler,
) -> Result<(), Cancelled> {
    let disks = job.pages.regions().skip(target.ram().len());
    for (region, map) in disks {
        copy_disk(target, states, job, filler, region, map)?;
        if job.consistent {
            // Blocks that a writer pulled may still be under copy.
            for run in map.runs(0) {
                states.wait_copied(region, run);
            }
        }
    }
    Ok(())
}

fn copy_disk(
    target: &dyn CutTarget,
    states: &PageStates,
    job: &Job,
    filler: &mut Filler,
    region: RegionId,
    map: &PageBitmap,
) -> Result<(), Cancelled> {
    for run in map.runs(0) {
        let mut start = run.start;
        while start < run.end {
            filler.make_room(job, Urgency::Bulk)?;
            let most = run.end.min(start + filler.room() as u32);
            let claimed = |page: &u32| {
                !job.consistent
                    || states.claim(PageAddr {
                        region,
                        page: *page,
                    })
            };
            let end = start + (start..most).take_while(claimed).count() as u32;
            if end == start {
                // A writer pulled it.
                start += 1;
                continue;
            }
            let range = PageRange { start, end };
            let memory = filler.next_pages(range.len() as usize);
            debug_assert_eq!(memory.len(), range.len() as usize * PAGE_SIZE);
            let read = target.read_disk(region, range, memory);
            for page in start..end {
                let addr = PageAddr { region, page };
                if job.consistent {
                    states.finish(addr);
                }
                filler.push(addr);
            }
            if let Err(error) = read {
                job.cancel(CancelReason::DiskRead {
                    region: region.0,
                    range,
                    why: error.to_string(),
                });
                return Err(Cancelled);
            }
            start = end;
        }
    }
    Ok(())
}

fn let_go(target: &dyn CutTarget, states: &PageStates, job: &Job) {
    if job.consistent {
        states.disarm(&job.pages);
        for (range, map) in ram_maps(target.ram(), &job.pages) {
            for run in map.runs(PROTECT_GAP_PAGES) {
                job.capture.release(range.region, run);
            }
        }
    }
    job.discard_pulled();
}
