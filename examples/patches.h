// Converts between a frame's tokens (tokens, values of a patch) and video (channels, frames, height, width).
#pragma once

#include "config.h"

namespace example {

// Calls visit(index among the tokens, index in the video) for every number of a frame. A patch is ordered by video
// frame, row, column, channel.
template <class Visit>
void for_each_number(const Config& c, Visit visit) {
  int64_t number = 0;
  for (int64_t row = 0; row < c.height; row += c.patch_height)
    for (int64_t column = 0; column < c.width; column += c.patch_width)
      for (int64_t frame = 0; frame < c.frames; ++frame)
        for (int64_t y = row; y < row + c.patch_height; ++y)
          for (int64_t x = column; x < column + c.patch_width; ++x)
            for (int64_t channel = 0; channel < c.channels; ++channel)
              visit(number++, ((channel * c.frames + frame) * c.height + y) * c.width + x);
}

}  // namespace example
