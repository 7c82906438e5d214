# Compute capability 9.0 is compiled as 9.0a wherever machine code for it is asked for: the kernels for its tensor cores are
# made of instructions that no later GPU has. What is asked for as code of a virtual GPU stays, for later ones.
#
# `list` names a list as in CMAKE_CUDA_ARCHITECTURES, and is set to what to compile; `native`, `all` and `all-major` are
# taken from the variables that enable_language(CUDA) leaves.
function(pom_exact_architectures list)
  set(given ${${list}})
  if(given STREQUAL "native" AND CMAKE_CUDA_ARCHITECTURES_NATIVE)
    set(given ${CMAKE_CUDA_ARCHITECTURES_NATIVE})
  elseif(given STREQUAL "all" AND CMAKE_CUDA_ARCHITECTURES_ALL)
    set(given ${CMAKE_CUDA_ARCHITECTURES_ALL})
  elseif(given STREQUAL "all-major" AND CMAKE_CUDA_ARCHITECTURES_ALL_MAJOR)
    set(given ${CMAKE_CUDA_ARCHITECTURES_ALL_MAJOR})
  endif()
  set(exact "")
  foreach(architecture IN LISTS given)
    if(architecture STREQUAL "90")
      list(APPEND exact 90a-real 90-virtual)
    elseif(architecture STREQUAL "90-real")
      list(APPEND exact 90a-real)
    else()
      list(APPEND exact ${architecture})
    endif()
  endforeach()
  list(REMOVE_DUPLICATES exact)
  set(${list} ${exact} PARENT_SCOPE)
endfunction()
