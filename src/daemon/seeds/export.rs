//! Where a seed's content comes from: a guest that runs here, or a recovery point.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::mpsc;

use super::super::exports::hold;
use super::super::orders::Reply;
use super::super::standbys::Shared;
use super::writer::SeedWriter;
use super::{Exported, failed};
use crate::clock::Env;
use crate::control::runs::RunHandle;
use crate::control::types::{ApiError, ProgressUnit, SeedReport};
use crate::frame::Manifest;
use crate::guest::any::AnyGuest;
use crate::guest::{Chunk, Contents, CutStrategy, Guest};
use crate::ids::{Generation, GuestId};
use crate::page::{PAGE_SIZE, PageAddr};
use crate::primary::{Command, Outcome};

/// Fuzzy rounds after the first one, at most.
const ROUNDS_MAX: usize = 8;
/// So few changed pages are left to the cut: 16 MiB.
const CUT_PAGES: u64 = 4096;
/// Pages of a point that are read at once.
const CHUNK_PAGES: u32 = 256;

/// A seed that is asked for.
pub(in crate::daemon) struct Exporting {
    pub run: Arc<RunHandle>,
    pub file: PathBuf,
    pub reply: Reply<SeedReport>,
}

/// Lends the guest to its export. It comes back as from a role that was drained.
pub(in crate::daemon) async fn lend(
    env: Env,
    id: GuestId,
    generation: Generation,
    mut guest: AnyGuest,
    asked: Exporting,
    mut commands: mpsc::Receiver<Command>,
) -> (Outcome, AnyGuest) {
    let Exporting { run, file, reply } = asked;
    let written = {
        let writing = write(&env, &id, generation, &mut guest, &file, &run);
        tokio::select! {
            written = writing => written,
            // The guest is wanted for something else.
            _ = commands.recv() => Err(failed("the export was ended: the guest was wanted back")),
        }
    };
    // Nothing was settled: the guest tracks as before.
    if let Err(error) = guest.give_back().await {
        tracing::warn!(guest = %id, %error, "the guest did not take back what an export had read");
    }
    drop(run);
    // Whoever asked may have gone.
    let _ = reply.send(written);
    (Outcome::Drained, guest)
}

async fn write(
    env: &Env,
    id: &GuestId,
    generation: Generation,
    guest: &mut AnyGuest,
    file: &Path,
    run: &Arc<RunHandle>,
) -> Exported {
    let (layout, machine) = (guest.info().layout.clone(), guest.info().machine.clone());
    let (place, owned, total) = (file.to_owned(), id.clone(), layout.pages());
    let shape = layout.clone();
    let creating = env.offload(move || SeedWriter::create(&place, &owned, generation, shape));
    let mut writer = creating.await?;
    let mut done = 0;
    let mut contents = Contents::All;
    for _ in 0..=ROUNDS_MAX {
        let round = guest.round(contents).await.map_err(failed)?;
        let few = contents == Contents::Dirty && round.dirty.count() <= CUT_PAGES;
        (writer, done) = take(env, guest, writer, run, (done, total)).await?;
        if few {
            break;
        }
        contents = Contents::Dirty;
    }
    let cut = guest.cut(CutStrategy::Auto).await.map_err(failed)?;
    let (writer, _) = take(env, guest, writer, run, (done, total)).await?;
    let manifest = Manifest {
        layout,
        machine,
        device_state: cut.device_state.to_bytes(),
    };
    env.offload(move || writer.finish(&manifest, cut.captured_at, cut.pause))
        .await
}

/// Writes all content of a round or cut.
async fn take(
    env: &Env,
    guest: &mut AnyGuest,
    mut writer: SeedWriter,
    run: &RunHandle,
    (mut done, total): (u64, u64),
) -> Result<(SeedWriter, u64), ApiError> {
    while let Some(chunk) = guest.next_chunk().await.map_err(failed)? {
        done += chunk.pages.len() as u64;
        let pushing = env.offload(move || writer.push(chunk).map(|()| writer));
        writer = pushing.await?;
        run.progress(done.min(total), total, ProgressUnit::Pages);
    }
    Ok((writer, done))
}

/// Writes the newest recovery point. Blocks; the copy is locked only while the point is found.
pub(super) fn point(copy: &Shared, guest: &GuestId, file: &Path, run: &RunHandle) -> Exported {
    let held = hold(copy, guest, None)?;
    let point = held.point().clone();
    run.detail(format!("point #{}", point.epoch));
    let view = held.index(&mut |_| {}).map_err(failed)?;
    let (manifest, layout) = (view.manifest(), view.manifest().layout.clone());
    let mut writer = SeedWriter::create(file, guest, point.generation, layout.clone())?;
    let (mut done, total) = (0, layout.pages());
    for (region, what) in layout.iter() {
        let mut first = 0;
        while first < what.pages {
            let count = (what.pages - first).min(CHUNK_PAGES);
            let addresses = first..first + count;
            let pages: Vec<PageAddr> = addresses.map(|page| PageAddr { region, page }).collect();
            let mut memory = vec![0; pages.len() * PAGE_SIZE];
            let (contents, _) = memory.as_chunks_mut::<PAGE_SIZE>();
            for (addr, content) in pages.iter().zip(contents) {
                view.read_page(*addr, content).map_err(failed)?;
            }
            let memory = Box::new(memory);
            writer.push(Chunk { pages, memory })?;
            first += count;
            done += u64::from(count);
            run.progress(done, total, ProgressUnit::Pages);
        }
    }
    writer.finish(manifest, point.captured_at, std::time::Duration::ZERO)
}
