"""The demo's report as Markdown."""


def markdown(report):
    """The text of report.md from the contents of report.json."""
    images, video = report["images"], report["video"]
    sampling, digits, stream = images["sampling"], images["samples_read_as_requested_by_digit"], video["stream"]
    costs, clip, length = video["costs"], video["clip_frames"], stream["frames"]
    accuracy = images["classifier_accuracy_on_real_images"]

    def solver(drawn, unit):
        return f"{drawn['seconds']} s, {drawn['steps']} {drawn['solver']} {unit}, guidance {drawn['guidance']}"

    def beside_real(row, name, decimals):
        return f"{row[name]:.{decimals}f} ({row[name + '_real']:.{decimals}f})"

    def span(row):
        cells = [f"{row['frames'][0]} to {row['frames'][1]}", f"{row['read']:.1%}"]
        cells += [beside_real(row, name, 2) for name in ("speed", "acceleration", "cosine")]
        return "| " + " | ".join([*cells, beside_real(row, "mass", 0), beside_real(row, "frechet", 1)]) + " |"

    spans = "\n".join(span(row) for row in video["by_length"])

    def last_frame(name):
        return f"{costs[name]['milliseconds'][-1]:.1f} ms and {costs[name]['bytes'][-1]:,} bytes"

    return f"""# Demo: digits drawn, moved and streamed by PoM

{report["machine"]}, on {images["device"]}; everything in {report["total_seconds"]} s

## Images

| | |
|---|---|
| model | ImageDiT, {images["parameters"]:,} parameters, mixer {images["model"]["mixer"]} |
| training | {images["steps"]:,} steps in {images["training_seconds"]} s ({images["milliseconds_per_step"]} ms a step) |
| final loss | {images["final_loss"]} |
| sampling | {sampling["images"]} images in {solver(sampling, "steps")} |
| requested digit read in | **{images["samples_read_as_requested"]:.1%}** of the samples |
| the classifier itself | {accuracy:.1%} on 1,000 real images it was not trained on |

| digit | {" | ".join(digits)} |
|---|{"---|" * len(digits)}
| read | {" | ".join(f"{share:.0%}" for share in digits.values())} |

![samples](samples.png)

![loss](loss.png)

## Video

The image model goes on as a video model: it learns moving digits in clips of {clip} frames, then streams {length}.

| | |
|---|---|
| training | {video["steps"]:,} steps in {video["training_seconds"]} s ({video["milliseconds_per_step"]} ms a step) |
| final loss | {video["final_loss"]} |
| streaming | {stream["videos"]} videos of {length} frames in {solver(stream, "steps a frame")} |
| what a video remembers | {video["state_bytes_per_video"]:,} bytes, however long it is |
| requested digit read within {clip} frames | **{video["read_within_the_trained_length"]:.1%}** |
| in the last frames of twice that | **{video["read_at_twice_the_trained_length"]:.1%}** |
| the classifier itself | {video["classifier_accuracy_on_real_frames"]:.1%} on real frames it was not trained on |
| frame {len(costs["PoM"]["bytes"])} | {last_frame("PoM")}; with attention {last_frame("attention")} |

Whether the stream lasts, and in brackets what real videos of the same digits reach: the share of frames read as
requested; the speed of the digit's centre in pixels a frame; how much its step changes from frame to frame
(acceleration, and the cosine between steps); the sum of the brightness of a frame; and the Fréchet distance of clips of
8 frames from real ones.

| frames | read | speed | acceleration | cosine | stroke mass | Fréchet distance |
|---|---|---|---|---|---|---|
{spans}

![video](video.gif)

![frames](video.png)

![time and memory of a frame](stream.png)
"""
