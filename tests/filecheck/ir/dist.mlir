// RUN: furiosa-llm opt %s --split-input-file | filecheck %s

// A table cut by rows, a pair of products cut between them, logits cut by the vocabulary.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 1>} {
nn.parameter @table : tensor<5x4xbf16>
nn.parameter @up : tensor<3x4xbf16>
nn.parameter @down : tensor<4x3xbf16>
func.func @forward(%ids: tensor<2x1xi32>) -> tensor<2x1x4xbf16> attributes {"dist.argument_cuts" = [unit], "dist.result_cuts" = [#dist.cut<2, 4, [[0:3], [3:5]]>]} {
  %table = dist.get_shard @table cut <0, 4, [[0:3], [3:5]]> : tensor<4x4xbf16>
  %up = dist.get_shard @up cut <0, 1, [[0:1, 1:2], [2:3, -]]> : tensor<2x4xbf16>
  %down = dist.get_shard @down cut <1, 2, [[0:2], [2:3]]> : tensor<4x2xbf16>
  %rows = dist.local_rows %ids cut <0, 4, [[0:3], [3:5]]> : tensor<2x1xi32> -> tensor<2x1xi32>
  %e = nn.embedding %rows, %table : tensor<2x1xi32>, tensor<4x4xbf16> -> tensor<2x1x4xbf16>
  %x = dist.all_reduce %e mask 1 : tensor<2x1x4xbf16> -> tensor<2x1x4xbf16>
  %h = nn.linear %x, %up : tensor<2x1x4xbf16>, tensor<2x4xbf16> -> tensor<2x1x2xbf16>
  %p = nn.linear %h, %down : tensor<2x1x2xbf16>, tensor<4x2xbf16> -> tensor<2x1x4xf32>
  %y = dist.all_reduce %p mask 1 algorithm "rotate" : tensor<2x1x4xf32> -> tensor<2x1x4xbf16>
  %m = dist.all_reduce %p mask 1 kind "max" algorithm "switch" : tensor<2x1x4xf32> -> tensor<2x1x4xf32>
  %l = nn.linear %y, %table : tensor<2x1x4xbf16>, tensor<4x4xbf16> -> tensor<2x1x4xbf16>
  func.return %l : tensor<2x1x4xbf16>
}
}
// CHECK:      builtin.module attributes {dist.mesh = #dist.mesh<2, 1>} {
// CHECK:      func.func @forward({{.*}}) -> tensor<2x1x4xbf16> attributes {dist.argument_cuts = [unit], dist.result_cuts = [#dist.cut<2, 4, {{\[\[}}0:3], [3:5]]>]} {
// CHECK-NEXT:   %table = dist.get_shard @table cut <0, 4, {{\[\[}}0:3], [3:5]]> : tensor<4x4xbf16>
// CHECK-NEXT:   %up = dist.get_shard @up cut <0, 2, {{\[\[}}0:2], [2:3]]> : tensor<2x4xbf16>
// CHECK:        %rows = dist.local_rows %ids cut <0, 4, {{\[\[}}0:3], [3:5]]> : tensor<2x1xi32> -> tensor<2x1xi32>
// CHECK:        %p = nn.linear %h, %down : {{.*}} -> tensor<2x1x4xf32>
// CHECK-NEXT:   %y = dist.all_reduce %p mask 1 algorithm "rotate" : tensor<2x1x4xf32> -> tensor<2x1x4xbf16>
// CHECK-NEXT:   %m = dist.all_reduce %p mask 1 kind "max" algorithm "switch" : tensor<2x1x4xf32> -> tensor<2x1x4xf32>

// -----

// The other collectives, and two stages.
builtin.module attributes {"dist.mesh" = #dist.mesh<2, 2>} {
func.func @forward(%x: tensor<5xf32>) -> tensor<5xf32> {
  %a = dist.reduce_scatter %x cut <0, 3, [[0:3], [3:5]]> algorithm "scatter_gather" : tensor<5xf32> -> tensor<3xbf16>
  %b = dist.all_gather %a cut <0, 3, [[0:3], [3:5]]> : tensor<3xbf16> -> tensor<5xbf16>
  %c = dist.shard %b cut <0, 3, [[0:3], [3:5]]> : tensor<5xbf16> -> tensor<3xbf16>
  dist.send %c to 1 : tensor<3xbf16>
  %d = dist.recv from 0 : tensor<3xbf16>
  func.return %x : tensor<5xf32>
}
}
// CHECK:      %a = dist.reduce_scatter %x cut <0, 3, {{\[\[}}0:3], [3:5]]> algorithm "scatter_gather" : tensor<5xf32> -> tensor<3xbf16>
// CHECK-NEXT: %b = dist.all_gather %a cut <0, 3, {{\[\[}}0:3], [3:5]]> : tensor<3xbf16> -> tensor<5xbf16>
// CHECK-NEXT: %c = dist.shard %b cut <0, 3, {{\[\[}}0:3], [3:5]]> : tensor<5xbf16> -> tensor<3xbf16>
// CHECK-NEXT: dist.send %c to 1 : tensor<3xbf16>
// CHECK-NEXT: %d = dist.recv from 0 : tensor<3xbf16>
